"""A small vision-language model trained from nothing, on pictures made here: what pruning does to answers.

``scenes`` says what is in a picture, ``paint`` draws it, ``questions`` asks about it, ``language`` has the
words, ``model`` the architecture, ``train`` makes the weights and ``export`` ships them.
"""
