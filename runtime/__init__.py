"""What an emitted program calls while it runs: reshards, exchanges, attention, and the mesh they run on.

Communicating functions take a keyword-only `group`: the name of a process group, or any object with the
methods of `groups.LocalGroup` (threads in `simulate`, byte counting in `counting`).
"""
