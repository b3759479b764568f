"""From a batch to its gradient. Read four files in this order; a value moves forward only:

    backward     the call: its options, what is remembered from step to step
    deciding     known log-probs, else signs, then a draft, then a forward pass without a graph; then the gate
    passes       forward and backward passes over micro-batches, and what is refused before it is differentiated
    inputs       what was given, checked; rows of it

Beside them: `batches` (rows, whatever a batch is made of), `packing` (rows into micro-batches), `counts` and `report`
(what ran). docs/how_a_step_runs.md has the sequence as a diagram.
"""
