"""The laboratory: what the papers' experiments need, and only they. The library never imports it.

tasks      MNIST, token reversal, bandits: where rows and rewards come from
policies   small networks, fast on a CPU, and their samplers
training   the resumable loop behind `sparkjoy train`
studies    one claim each, with its runs, table and figure
bench      seconds and bytes of one step
commands   the command line
"""
