"""Before training, on every node of a job: what would fail or slow it, so that a bad node is named before hours are lost on it.

`python -m pretrain.preflight node` runs once on each node and writes DIR/NODE.json; `judge` compares what they have written. Of the
node's process, which lives as long as the examination:

`files` disks and shards, `devices` one process each that computes and all-reduces, `health` what NVIDIA's driver says, `meeting` the
nodes among themselves, `node` the order of all that, `report` what is written, `judge` and `table` what is made of it.
"""
