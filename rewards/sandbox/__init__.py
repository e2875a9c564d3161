"""The sandbox: runs programs that a model wrote, so that they reach nothing and a verdict on them cannot be forged.

    judge (reward worker) ── jobs, file descriptors ──▶ fork server ── fork ──▶ program, confined
          ▲                                             (clean: never               │
          └───────────── sealed files, read after the end ◀── ran model text) ◀─────┘

Each program runs in a fresh fork of a warm interpreter that never ran model text, in namespaces of its own, under Landlock, seccomp
and rlimits, with a temporary folder that dies with it. What is expected of a program never enters its process: it gives values, the
judge compares. Nothing outlives it: a program ends with its process id namespace or with its tracer, that with the server, the server
with its guard, and the guard ends all when the judge is gone. `rewards.sandbox.judge` has the API, `python -m rewards.sandbox doctor`
says what this machine can do.
"""
