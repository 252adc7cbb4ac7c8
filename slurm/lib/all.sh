# shellcheck shell=bash
# Sourced by slurm/lib.sh, from the run's own copy of the code where there is one: so is the list of what there is.

# shellcheck source=lib/site.sh
source "$CODE/slurm/lib/site.sh"
# shellcheck source=lib/submit.sh
source "$CODE/slurm/lib/submit.sh"
# shellcheck source=lib/launch.sh
source "$CODE/slurm/lib/launch.sh"
# shellcheck source=lib/preflight.sh
source "$CODE/slurm/lib/preflight.sh"
# shellcheck source=lib/survive.sh
source "$CODE/slurm/lib/survive.sh"
# shellcheck source=lib/go_on.sh
source "$CODE/slurm/lib/go_on.sh"
# shellcheck source=lib/pretrain.sh
source "$CODE/slurm/lib/pretrain.sh"
# shellcheck source=lib/tools.sh
source "$CODE/slurm/lib/tools.sh"
# shellcheck source=lib/acceptance.sh
source "$CODE/slurm/lib/acceptance.sh"
# shellcheck source=lib/tokenize.sh
source "$CODE/slurm/lib/tokenize.sh"
