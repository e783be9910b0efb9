"""What makes a run survive, and what no paper describes. Nothing here knows about masks or losses.

    flags     one table says all about a flag
    command   processes, signals, and errors of one line
    checkpointer   the course of a run: steps, exact resume
    progress  means between two log lines, and how far a run is
    files     the output folder, checkpoints, log lines
    results   accuracies, confusion, features
    images    image files in, batches from workers
    pictures  sheets and curves, as PNG files
    weights   our files, torchvision's, the authors'
    chain     torchvision's nets as chains of modules
    optim     learning rates, parameter groups, LAMB, the moving average of the weights
"""
