"""llmkit's own kernels: one folder per operation, each with the plain twin that defines it.

`table.rows()` says which row of each operation is live on this machine, and why.
"""
