# Functions that the scripts share. Sourcing it sets `repo`, `cache` and `me`, and starts nothing.
# shellcheck shell=bash disable=SC2034
me=${0##*/}
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cache=$(realpath -ms "${UMCG_CACHE:-${HOME:-/root}/.cache/scx_umcg}")

say() { printf '%s: %s\n' "$me" "$*" >&2; }

# fail MESSAGE: "what is wrong; what to do"
fail() { say "$@"; exit 2; }

# usage: the comment at the head of the calling script
usage() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; }

# need COMMAND GROUP: the packages of `scripts/deps GROUP` bring COMMAND
need() { command -v "$1" >/dev/null || fail "$1 is missing; run scripts/deps $2"; }
