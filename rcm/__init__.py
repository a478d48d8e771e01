"""rCM: distilling diffusion models into one to four steps, in continuous time.

Mathematics, in reading order:

    trigflow             the path, its velocity, networks F(x, t), and flow maps
    dual_numbers         tensors with a tangent, taken apart
    norms                normalisations whose JVP has the right gradient
    jvp_rules            rules for linear layers and others, with which a JVP is fast
    derivatives          derivatives of networks: exact, or by differences
    time_conversions     TrigFlow's t, EDM's σ, rectified flow's u, timesteps of DDPM
    time_precision       checks that a network does not round its time
    time_sampling        distributions of the training time
    time_pairs           distributions of the two times of a flow map
    predictions          F from a prediction of eps, v, x0 or flow, and the inverse
    network_conversions  networks of rectified flow, EDM and DDPM as TrigFlow networks, and back
    guidance             classifier-free guidance
    ode                  one step of the probability-flow ODE: Euler, DDIM, Heun
    sampling             the few-step sampler, and Heun's method for a teacher
    gaussian_mixture     data whose velocity is known exactly, to test methods on
    losses               flow matching; consistency, continuous (sCM, rCM) and discrete (dCM, LCM);
                         distribution matching (DMD)

Training:

    models, data      the networks and the data sets, each with its config
    distributed       ranks, sharding, context parallelism, loading of weights
    methods           which networks, losses and optimizers step when
    training          trainer, loop, optimizer, averaged weights, checkpoints, run folder, config
    evaluation        metrics of samples, the protocol of a run, its report, a page that
                      compares runs
    presets           functions that return a config
    run               a run: run_from_scratch trains its own teacher, run_pretrained takes one
    trained_networks  the settings and networks of a run folder, for the commands below
    train, sample, evaluate, report
                      the commands; python -m rcm.data.check reads a data set

Each part imports only from those above it, except that the methods use the tools of `training`.
"""

import torch
from torch.torch_version import TorchVersion

if TorchVersion(torch.__version__) < "2.13":
    raise ImportError(
        f"rcm needs torch 2.13 or newer, but torch {torch.__version__} is installed: run "
        "pip install 'torch>=2.13'"
    )
