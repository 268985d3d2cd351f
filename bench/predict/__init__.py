"""What a GPU that nobody had would take for our kernels: a model, made from their compiled code.

``python -m bench.predict`` compiles the launches that the product's own launchers make, runs the machine
code's integer part (addresses, masks, loops) to count what each launch executes and moves, and turns the
counts into microseconds with published constants of an H100. ``sass`` reads machine code, ``integers`` and
``machine`` run it, ``kernel`` compiles and counts, ``hopper`` has the constants, ``model`` the arithmetic,
``calls`` what is predicted, ``record`` the file.
"""
