"""Files -> patches.

In: a folder in nnU-Net raw layout, image files of any supported format. Out: `Dataset` and `Split` (`dataset`: who is
labelled), `Plan` (`plan`: spacing, patch, normalisation), prepared volumes and the way back to the input's grid
(`prepare`), batches of patches (`sampling`) and of
whole volumes (`whole`), what is done to them (`augment`), synthetic volumes (`phantoms`), and the public datasets we know
(`catalogue`, one file each).
"""
