"""What is measured on: labelled and captioned images and videos in the layouts in which data sets are published."""
