"""The command ``bloom``: one module for each of its verbs, imported when the verb is chosen.

A module holds the command line of its verb and imports what is slow, torch above all, once that
line has been read: so each help is there at once.
"""
