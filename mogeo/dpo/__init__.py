"""Direct preference optimisation with several objectives: a user of mogeo's optimizer, never the other way round.

`losses` turns a model and token ids into preference losses; `data` turns rated completions into one preference set per
objective; `tokens` into tokens; `train.align` puts them through `mogeo.MultiObjectiveOptimizer`; `scoring` measures.
`generate` lets a model speak, and `judged` has a `judge` compare what it says with `golden` responses.
Nothing is imported here, so that `mogeo --help` does not have to wait for torch and transformers.
"""
