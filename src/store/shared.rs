//! Interim.
#![forbid(unsafe_code)]

use std::path::Path;
use std::sync::Mutex;

use crate::model::event::Head;
use crate::store::{Durability, Store, StoreError, Tx, View};

pub struct SharedStore(Mutex<Store>);

impl SharedStore {
    pub fn open_single(state_dir: &Path) -> Result<Self, StoreError> {
        Ok(Self(Mutex::new(Store::open(state_dir)?)))
    }

    pub fn open(state_dir: &Path) -> Result<Self, StoreError> {
        Self::open_single(state_dir)
    }

    pub fn transaction<T>(
        &self,
        durability: Durability,
        step: impl FnOnce(&mut Tx<'_>) -> Result<T, StoreError>,
    ) -> Result<(T, Head), StoreError> {
        self.0.lock().unwrap().transaction(durability, step)
    }

    pub fn read<T>(
        &self,
        look: impl FnOnce(&View<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.0.lock().unwrap().read(look)
    }

    pub fn tidy(&self) -> Result<bool, StoreError> {
        self.0.lock().unwrap().tidy()
    }
}
pub struct Heads {
    pub latest: Head,
    pub durable: Head,
}
impl SharedStore {
    pub fn heads(&self) -> Option<Heads> {
        None
    }
}
