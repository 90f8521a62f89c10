"""`mogeo plan`: the memory and time that a fine-tune with K objectives takes, before a model is loaded.

`activations` measures a forward and backward without data, `memory` and `cost` are arithmetic on that, `recommend`
chooses a mode, and `command` prints it all.
"""
