"""Speed and memory of a round, measured on the machine at hand; shared by the scripts of `benchmarks/`.

machine     what the machine is, and the float32 matmul peak that it reaches
command     the command that started a script
timing      interleaved runs, medians, ratios
world       a round's data and initial adapter, the same for whoever runs it
ours        this package's round in a world
peer        a PyTorch + PEFT process that runs the same world
cells       one comparison from start to end, a line of JSON each
shipped     rounds of the model that ships, for `benchmarks/shipped.py`
"""
