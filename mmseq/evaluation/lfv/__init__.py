"""The benchmark of learning from video, in closed loop: does video without actions make a robot better?

    mmseq bench lfv out=runs/lfv

==============  ==================================================================================================
`manifest.py`   what a cell is, the tasks, the ladder of video, the layouts that are driven; the same on every machine
`record.py`     the data of cells, recorded from seeds: demonstrations, play, video
`methods.py`    what is compared, a plug-in group: `mmseq.methods`
`cloning.py`    behaviour cloning with a small network: a peer without video
`run.py`        cells, one after the other
`rows.py`       what is kept of a cell
`report.py`     a table on the console, and a page
==============  ==================================================================================================

A cell is (method, robot data, video, seed). Success is measured on tasks with robot data and on tasks that were seen as
video only, from the same layouts for every method, with true labels as the ceiling, and blanked pictures, other words
and random actions as floors.
"""
