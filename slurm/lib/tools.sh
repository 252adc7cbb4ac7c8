# shellcheck shell=bash
# Jobs that do not train.

# tool COMMAND...: submit this script, which was called with the command's last arguments; inside of a job, run the command.
tool() {
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    submit_tool
    return
  fi
  enter_environment
  only_shown "$@"
  FLAGS=("${ARGUMENTS[@]}")
  inside "$@"
}

# Serves until the time limit comes near, and then in the next start of this job, perhaps on another node.
mlflow_server() {
  local folder address port server=""
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    submit_tool
    return
  fi
  enter_environment
  folder=${QSPARSE_MLFLOW:-${QSPARSE_RUNS:-$PWD/runs}/mlflow}
  only_shown "python -m mlflow server $*, in $folder"
  mkdir -p "$folder"
  # One server at a time: a database in a file is for one process.
  exec 9>"$folder/lock"
  flock --nonblock 9 || die "another server uses $folder: end it (scancel), or choose another QSPARSE_MLFLOW"
  address=$(address_of "$SLURMD_NODENAME") port=$((10000 + SLURM_JOB_ID % 20000))
  trap 'say "USR1: going on in the next start"; end_process "$server"; patiently scontrol requeue "$(this_job)"; exit 0' USR1
  trap 'end_process "$server"; exit 0' TERM
  export MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=1
  inside_exec python -m mlflow server --host 0.0.0.0 --port "$port" --allowed-hosts "$address:$port,localhost:*,127.0.0.1:*" \
    --backend-store-uri "sqlite:///$folder/mlflow.db" --artifacts-destination "$folder/artifacts" --workers 2 \
    --uvicorn-opts "--log-level warning" "$@" 9>&- &
  server=$!
  until curl --silent --fail --noproxy '*' "http://$address:$port/health" >/dev/null 2>&1; do
    kill -0 "$server" 2>/dev/null || die "the server did not start, see above"
    sleep 0.5
  done
  echo "http://$address:$port" >"$folder/mlflow.uri.new" && mv "$folder/mlflow.uri.new" "$folder/mlflow.uri"
  say "serving at http://$address:$port; for your jobs: export MLFLOW_TRACKING_URI=\$(cat $folder/mlflow.uri)"
  wait "$server"
}

# end_process PID: none where there is none yet.
end_process() {
  [ -z "$1" ] || { kill "$1" 2>/dev/null && wait "$1"; } || true
}
