#!/usr/bin/env bash
# Post a Markdown file as the one kvxform comment of a pull request: written once, then replaced.
#
# usage: post_comment.sh FILE
#   GITHUB_REPOSITORY and PR_NUMBER say where; GH_TOKEN may write to pull requests.
set -euo pipefail

mark='<!-- kvxform -->'
body=$(mktemp)
trap 'rm -f "$body"' EXIT
printf '%s\n%s\n' "$mark" "$(cat "$1")" > "$body"

comments="repos/$GITHUB_REPOSITORY/issues/$PR_NUMBER/comments"
ours=".[] | select(.body | startswith(\"$mark\")) | .id"
id=$(gh api --paginate "$comments" --jq "$ours" | sed -n 1p)
if [ -n "$id" ]; then
  gh api --silent -X PATCH "repos/$GITHUB_REPOSITORY/issues/comments/$id" -F "body=@$body"
else
  gh api --silent "$comments" -F "body=@$body"
fi
