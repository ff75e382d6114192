#!/bin/bash
# Stands for Python in tests of the batch script: `-m muybridge.train OVERRIDE...` does what the run's file `train` says in bash, and so
# for muybridge.slurm.health and muybridge.slurm.stage. What each task was given is left in the folder of its life.
set -u
life_dir=$MUYBRIDGE_LIFE_DIR run_dir=${MUYBRIDGE_LIFE_DIR%/slurm/lives/*} life=${SLURM_RESTART_COUNT:-0} phase=${2##*.}
given=$life_dir/given-$phase-$RANK

leave() { # CODE [WHO [CAUSE]]: all ranks, after rank 0 has written how it ended
    if [ "$RANK" = 0 ]; then
        printf '%s\n' "$1" "${2:-nobody}" "${3:-}" >"$life_dir/ended.new" && mv "$life_dir/ended.new" "$life_dir/ended"
    fi
    wait_for "$life_dir/ended"
    exit "$1"
}
save() { [ "$RANK" != 0 ] || { mkdir -p "$run_dir/checkpoints" && echo "$1" >"$run_dir/checkpoints/LATEST"; }; } # NAME
wait_for() { until [ -e "$1" ]; do sleep 0.05; done; } # FILE

env -0 >"$given.env"
pwd >"$given.folder"
echo $$ >"$given.pid"
printf '%s\0' "$@" >"$given.new" && mv "$given.new" "$given.argv"
echo "$phase: rank $RANK of life $life"
# shellcheck disable=SC1090 # the test writes it
[ ! -e "$run_dir/$phase" ] || . "$run_dir/$phase"
