"""Are the nodes of a job fit for training? One process a device looks at its own, and measures together with the others.

    node   in each process: writes what it finds to a folder that all nodes see
    judge  afterwards, once: names the bad nodes

Every step has its time; a node that does not come, hangs or cannot reach the folder is found by what is missing of it.
"""
