"""Speed and memory of a round, measured on the machine at hand; what `fedvlm bench` and `benchmarks/` share.

machine     what the machine is, and the float32 matmul peak that it reaches
flops       the model's arithmetic in a function: matmuls of the forward pass and of the gradients that are needed
timing      interleaved runs, medians, ratios
world       a round's data and initial adapter, the same for whoever runs it
ours        this package's round in a world
peer        a PyTorch + PEFT process that runs the same world
cells       one comparison from start to end, a line of JSON each
shipped     what `fedvlm bench` measures on the model that ships
"""
