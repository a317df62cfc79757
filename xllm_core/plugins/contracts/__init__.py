"""What plugins build and the core calls. Protocols and plain data only; one file per contract.

Importing this package loads no torch: tensor types are named for the reader and the type checker.
"""
