/* Takes the options of srun that the container plugin pyxis has, and tells each task what it was given; there is no container. */
#include <slurm/spank.h>
#include <stdlib.h>
#include <string.h>

SPANK_PLUGIN(pyxis_options, 1)

#define OPTIONS 3
static char *given[OPTIONS];
static const char *told[OPTIONS] = {"CONTAINER_IMAGE", "CONTAINER_MOUNTS", "CONTAINER_WORKDIR"};

static int take(int index, const char *argument, int remote) {
  (void)remote;
  free(given[index]);
  given[index] = strdup(argument);
  return 0;
}

static struct spank_option options[] = {
    {"container-image", "IMAGE", "image", 1, 0, take},
    {"container-mounts", "SRC:DST", "mounts", 1, 1, take},
    {"container-workdir", "PATH", "working directory", 1, 2, take},
    SPANK_OPTIONS_TABLE_END,
};

int slurm_spank_init(spank_t spank, int argc, char **argv) {
  (void)argc;
  (void)argv;
  for (int i = 0; i < OPTIONS; i++) spank_option_register(spank, &options[i]);
  return 0;
}

int slurm_spank_task_init(spank_t spank, int argc, char **argv) {
  (void)argc;
  (void)argv;
  for (int i = 0; i < OPTIONS; i++)
    if (given[i]) spank_setenv(spank, told[i], given[i], 1);
  return 0;
}
