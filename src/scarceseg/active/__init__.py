"""A finished run -> which unlabelled volume to label next.

In: the student's prediction of every volume of the pool, the labels other teachers of the run guessed, and features of the
labelled volumes. Out: a ranking, as ``suggestions.json`` in the run folder and a section of its report. One volume is
measured in `measure` (`features` says what it looks like), `scores` holds the arithmetic, `words` says it in sentences, and
`suggest` does it for a run. No label of an unlabelled case is opened.
"""
