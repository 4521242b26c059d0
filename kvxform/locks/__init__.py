"""Locks: a small file that says what a build is, to be committed and checked in CI."""
