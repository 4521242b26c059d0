#!/usr/bin/env bash
# Check every lock of a git repository and leave the answer as files.
#
# usage: check_locks.sh [FOLDER]
#   FOLDER gets kvxform.md (for a comment), kvxform.xml (JUnit) and kvxform.sarif; default: kvxform-ci
#   BASE   revision that changes are shown against, for instance origin/main; default: none
#   LOCKS  lock files, with spaces between them; default: all that git tracks
#
# Exit code 0: all builds are what their locks say. 1: a lock is out of date. 2: an error.
set -euo pipefail

folder=${1:-kvxform-ci}
if [ -n "${LOCKS:-}" ]; then
  read -r -a locks <<< "$LOCKS"
else
  # Other tools have files called *.lock too; ours say so in their first line but one.
  mapfile -t locks < <(git ls-files -- '*.lock' | xargs -r -d '\n' grep -l '"kvxform_lock"')
fi
if [ "${#locks[@]}" -eq 0 ]; then
  echo "no locks: make one with kvxform lock MODEL -r RECIPE -o kvxform.lock" >&2
  exit 2
fi

options=(--out "$folder/kvxform.md" --out "$folder/kvxform.xml" --out "$folder/kvxform.sarif")
if [ -n "${BASE:-}" ]; then
  options+=(--base "$BASE")
fi
exec kvxform check "${locks[@]}" "${options[@]}"
