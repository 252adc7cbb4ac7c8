"""How runs are doing, from their directories alone: `python -m pretrain.status [RUN...]`.

    lines.py     the journal: its last lines, and how long each step took
    facts.py     all that a run directory says, damaged files included
    queue.py     what Slurm says of the jobs, where there is one
    goodput.py   useful over allocated time
    state.py     what follows: training, stalled, dead, ...
    show.py      a table, a page, JSON

Nothing is written, no server is asked but Slurm's, and nothing here imports torch or MLflow.
"""
