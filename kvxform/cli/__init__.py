"""The command line: one thin module per verb, each a `run` function that calls the library.

- `main`: the entry point; every error becomes one line and an exit code
- `output`: data on stdout, talk and progress on stderr
- `options`: options that several verbs share
- `targets`: what a TARGET argument may be; `lowerings`: what each lowering can run
- one module per verb: `optimize`, `export`, `generate`, `plan`, `explain`, `passes`, `recipes`,
  `evaluate`, `bench`, `demo`

Heavy imports (torch, transformers) stand inside `run`, so that help and listings are quick.
"""
