"""The infrastructure around the method: what no paper describes. Read the method's files first.

    command       processes, signals, errors of one line
    flags         the command line, from one table of flags
    settings      settings as a frozen dataclass; batch size and warm-up
    checkpointer  the course of a run: steps, exact resume
    description   model.json: what is needed to run a trained net on new pictures
    step          what fine-tuning, segmentation and detection share of a training step
    progress      means between two log lines, and how far a run is
    files         the output folder, checkpoints, log lines
    images        images that cannot be read, torchvision's datasets
    shapes        the drawn dataset `shapes`
    weights       backbones and heads from files: ours, torchvision's, the authors'
    chain         torchvision's nets as chains of modules
    optim         learning rates, parameter groups, LAMB, a moving average of the weights
    results       accuracies, confusion, features
    board         TensorBoard
    pictures      sheets of images and curves, as PNG files
"""
