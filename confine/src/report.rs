// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Layer by layer, what is in force, what is missing and why.

use std::fmt;

use crate::Layer;

/// What became of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerReport {
    /// Which.
    pub layer: Layer,
    /// Whether it is in force.
    pub in_force: bool,
    /// What it does here, or what is missing and why.
    pub detail: String,
}

/// What became of every layer, in the order in which they were applied. Its `Display` is one line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    layers: Vec<LayerReport>,
}

impl Report {
    pub(crate) fn new(layers: Vec<LayerReport>) -> Report {
        Report { layers }
    }

    /// Every layer.
    pub fn layers(&self) -> &[LayerReport] {
        &self.layers
    }

    /// Whether `layer` is in force.
    pub fn in_force(&self, layer: Layer) -> bool {
        self.layers.iter().any(|report| report.layer == layer && report.in_force)
    }

    /// The layers that are not in force.
    pub fn missing(&self) -> impl Iterator<Item = &LayerReport> {
        self.layers.iter().filter(|report| !report.in_force)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.layers.iter().try_for_each(|LayerReport { layer, in_force, detail }| {
            let state = if *in_force { "in force" } else { "MISSING" };
            writeln!(f, "{:<13} {state:<9} {detail}", layer.name())
        })
    }
}
