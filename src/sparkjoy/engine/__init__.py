"""From a batch to its gradient. A call of `GatedBackward` goes through these, and a value moves forward only:

    backward     the options, the call, what is remembered from step to step      <- read first
    auditing     now and then: the draft beside the policy, on the same rows
    step         see, decide, differentiate what is kept
    looking      what the gate decides on: known, settled by signs, drafted, screened, or seen in one dense pass
    passes       forward and backward passes over micro-batches
    ledger       counts what ran
    inputs       what was given, checked; rows of it

What they look up on the way: `plan` (which way is cheapest), `deciding` (scores, the gate, and what it may return),
`packing` (rows into micro-batches), `normalizer`, `sound` and `hooks` (what is refused before it is
differentiated), `screening` (a pass without a graph), `flops`, `counts` and `report`. `beside` and `comparing`
compute the dense gradient too, `coverage` watches which parts of the data are kept. `processes` has what changes
when several of them share a model; alone, each of its answers is the question.

docs/how_a_step_runs.md has the sequence as a diagram.
"""
