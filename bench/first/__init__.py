"""The first minutes on a GPU: is it right, same bits, and the measurements that decide what is built next.

``make gpu-first`` takes less than eight minutes. Steps run one after another, each in a process of its own,
so that one that fails, hangs or breaks the device's context leaves the others their turn; what a step finds
is in a file as soon as it is found. ``plan`` has the steps in order, ``budget`` their time, ``run`` runs one,
``checks`` is what they do, ``report`` the file and the page that is printed at the end.
"""
