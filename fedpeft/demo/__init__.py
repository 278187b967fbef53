"""The embedded demo: a tiny base model, four synthetic clinics and their recipe.

Needs no network and no data of anyone; must not know the training engine.
"""
