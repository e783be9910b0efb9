"""What makes a run survive, and what no paper describes. Nothing here knows about masks or labels.

    flags     one table says all about a flag
    command   processes, signals, and errors of one line
    journal   the course of a run: steps, exact resume
    files     checkpoints, log lines, broken images, pictures
    optim     learning rates, parameter groups, LAMB, the moving average of the weights
"""
