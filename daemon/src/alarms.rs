// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What drivers find wrong with images, on its way to the monitors (QAPI's `BLOCK_IMAGE_CORRUPTED`).

use std::sync::{Arc, Mutex, PoisonError};

use block::{Alarm, Corruption};
use serde_json::{Value, json};

use crate::wake::Wake;

/// Findings that no monitor has been told yet.
#[derive(Clone, Default)]
pub struct Alarms(Arc<Mutex<Vec<Corruption>>>);

impl Alarms {
    /// What drivers are given; `wake` gets the control thread's attention.
    pub fn alarm(&self, wake: Arc<Wake>) -> Alarm {
        let found = Arc::clone(&self.0);
        Alarm::new(move |corruption| {
            found.lock().unwrap_or_else(PoisonError::into_inner).push(corruption);
            wake.up();
        })
    }

    /// Takes the findings, as the event tells them.
    pub fn take(&self) -> Vec<Value> {
        let found = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        found.into_iter().map(event).collect()
    }
}

fn event(corruption: Corruption) -> Value {
    let Corruption { node_name, text, offset, size, fatal } = corruption;
    let mut data = json!({ "device": "", "node-name": node_name, "msg": text, "fatal": fatal });
    for (name, value) in [("offset", offset), ("size", size)] {
        if let Some(value) = value {
            data[name] = json!(value);
        }
    }
    data
}
