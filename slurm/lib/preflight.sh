# shellcheck shell=bash
# Inside of a job, before training: are the nodes fit for it?

preflight() { :; }
