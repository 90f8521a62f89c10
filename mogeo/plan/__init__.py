"""`mogeo plan`: what a fine-tune with K objectives takes per rank, and what a step costs, before anything is loaded.

`memory` and `cost` are arithmetic, `activations` runs a model's shapes, `command` is the command line.
"""
