"""rCM: distilling diffusion models into one to four steps, in continuous time.

Read in this order; each file is one idea and imports only from those above it.

    trigflow      one angle for the time, one output F for the network
    predictions   any teacher (eps, v, x0, flow) as such a network; guidance
    times         distributions of the training time
    losses        what a loss is; flow matching
    consistency   sCM: a derivative along the teacher's ODE as the target
    score         distribution matching with a critic, the regulariser of rCM
    sampling      the few-step sampler, and Heun's method for the teacher
    ema           averages of the weights
    metrics       how good are the samples?
    dit, digits   a network and 1797 real images to try it all on

A run, `python -m rcm.train`, is made of these:

    config        its settings, and presets
    checkpoint    files that survive a kill at any moment
    run_folder    what a run leaves, and who may write there
    training      the two phases: a teacher, then its student
    evaluation    which samples are scored, and against what
    report        the grid of samples and the table of scores
    train, sample the two commands
"""
