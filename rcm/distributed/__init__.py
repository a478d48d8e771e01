"""Training on several processes: one rank for each GPU, started by torchrun.

processes         join the process group that torchrun starts, or run alone
rendezvous        the environment of torchrun, and the store in which the ranks meet
heartbeat         end all ranks when one dies, hangs or fails
layout            the mesh of ranks: replicate, shard, ring, ulysses
collectives       linear collectives with their transpose and their JVP
context_parallel  one sequence on several ranks
sharding          parameters, gradients and optimizers in shards (FSDP2)
loading           a model of a folder, read straight into its shards
"""
