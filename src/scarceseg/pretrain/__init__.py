"""Pre-training of the two small foundation models: random volumes come in, packaged weights go out.

``volumes`` makes synthetic volumes and targets, ``click_task`` and ``mosaic_task`` make training tasks of them, ``loop`` trains,
``command`` is ``scarceseg-pretrain``. No real scan is read anywhere here.
"""
