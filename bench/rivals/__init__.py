"""Rivals in one harness, each proven against what its authors' code computed.

``golden`` reads such tensors, ``methods`` says which of the product's functions answers for each kind of
file, ``run`` goes through a folder of them.
"""
