"""Labels for video: what the robot did, and where it was, read off the pictures.

    mmseq labeller train sources=[shards/robot,shards/play] out=runs/labeller
    mmseq label runs/labeller videos labelled --camera front

===============  ================================================================================
`network.py`     eyes of its own: a small convolutional network over a window of frames
`training.py`    it learns from a robot's episodes, play above all, and is judged on held-out ones
`parts.py`       long video in parts that fit into memory
`labels.py`      episodes of video become episodes of the robot, each step with a confidence
===============  ================================================================================

A model of what actions do that has seen demonstrations alone reads the action off the scene, and is wrong in every
task that it does not know. What carries over to new tasks is play, small changes of the pictures, and pixels in place
of codes (docs/log.md). Judge a labeller on tasks that it was not taught, never on held-out episodes of those that it
was.
"""
