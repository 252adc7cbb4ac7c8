# shellcheck shell=bash
# Sourced on each node before its training processes start: what `make prebuild` has compiled goes to the node's own disk. What it lacks is compiled at its first use,
# by one process of the node: torch's and Triton's caches are locked.
mkdir -p "$QSPARSE_CACHE" && chmod 700 "$QSPARSE_CACHE"
if [ -d "$QSPARSE_PREBUILT" ]; then
  (
    # Of several processes of the node the first one copies, and the others wait for it.
    flock 9 || true
    cp -ru --no-preserve=ownership "$QSPARSE_PREBUILT/." "$QSPARSE_CACHE/" || echo "warning: $QSPARSE_PREBUILT could not be copied to $QSPARSE_CACHE" >&2
  ) 9>"$QSPARSE_CACHE/.copying"
fi
