"""Training on several processes: one rank for each GPU, started by torchrun.

processes          join the process group that torchrun starts, or run alone
rendezvous         the environment of torchrun, and the store in which the ranks meet
heartbeat          end all ranks when one dies, is stopped or fails
agreement          an error of one rank becomes an error of all
layout             the mesh of ranks: replicate, shard, ring, ulysses
collectives        linear collectives with their transpose and their JVP
token_plans        where the transformers of diffusers have tokens
token_split        the tokens of each rank
context_attention  attention over the tokens of several ranks: Ulysses and ring
context_parallel   one sample on several ranks
sharding           parameters, gradients and optimizers in shards (FSDP2)
tensors            tensors that may be sharded
pretrained_folder  a folder of diffusers and its files
stored_tensors     tensors of a safetensors file, read in part
loading            a model of a folder, read straight into its shards
"""
