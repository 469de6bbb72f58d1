"""Detection and instance segmentation: COCO and LVIS, Mask R-CNN and DINO on our backbones.

coco        reading and checking annotation files
dataset     a map-style data set, its augmentation and batches
networks    detectors from a configuration, and the learning rates of their layers
evaluation  AP over ranks, equal to pycocotools
pictures    detections, worst errors and precision-recall curves
"""
