"""Checkpoints as files: directories that appear complete or not at all, what is in them, and the command that looks after them.

    OUTPUT_DIR/checkpoints/
        step_00001200/            all that training needs to go on; the newest `checkpoint.keep_last` are kept
            state/                tensors, step count, generator states (megatron_qsparse.parallel.checkpoint)
            trainer.json          where training stands, what the run is, the layout that wrote it, the MLflow run
            config.yaml           the resolved configuration
            files.json            size and sha256 of every file above, and when; written last
        milestone_00001000/       the same with weights only, kept until someone prunes milestones
        step_00001250.partial/    being written, or what an interrupted save left: no checkpoint
        step_00000900.X.removed/  being removed, or what could not be removed; tried again at the next save

The learning rate is a function of the step and the samples are a function of their number: both follow from trainer.json.
Nothing here imports torch, and nothing unpickles: reading a checkpoint runs no code of whoever wrote it.
"""
