"""Ranks of a group as Ray actors (`--distributed-executor-backend ray`).

Ray starts processes from a daemon of its own, so they inherit nothing from the supervisor: neither
the ring nor the page of progress, nor does the supervisor see them end. Therefore the supervisor
starts, for each rank, a *rank proxy* (`proxy.py`) in the place of the rank. The proxy of rank 0
starts a driver that has Ray place one actor for each rank (`placement.py`). Each actor connects to
the proxy of its rank, is handed the descriptors and the settings (`handover.py`), and has the rank
for a child (`child.py`).

A proxy lives exactly as long as its rank, and both end together. So a group is watched, ended and
started again as without Ray, and between ready ranks there is neither Ray nor a proxy.

Where this host has too little for all ranks, they are dealt out over the cluster's nodes
(`planning.py`). The actor of a rank on another host connects over TCP (`handshake.py`), its proxy
is the rank's end of what the ranks of one host share (`relay.py`), and the actor has the same there
for this rank alone (`remote_child.py`).
"""
