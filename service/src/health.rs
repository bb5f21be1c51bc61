//! What a process depends on, and whether each of it works now.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The dependencies of one process. Cheap to clone; all clones share the state.
#[derive(Debug, Clone, Default)]
pub struct Health {
    failing: Arc<Mutex<BTreeMap<&'static str, String>>>,
}

/// One dependency, for instance `postgres`. Starts as failing ("not yet reached").
#[derive(Debug, Clone)]
pub struct Dependency {
    name: &'static str,
    health: Health,
}

impl Health {
    /// Registers a dependency; until it is first reported up the process is not ready.
    #[must_use]
    pub fn dependency(&self, name: &'static str) -> Dependency {
        let dependency = Dependency { name, health: self.clone() };
        dependency.down("not yet reached");
        dependency
    }

    /// The failing dependencies with the reason of each. Empty means ready.
    #[must_use]
    pub fn failing(&self) -> BTreeMap<&'static str, String> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Dependency {
    pub fn up(&self) {
        self.health.failing.lock().unwrap_or_else(PoisonError::into_inner).remove(self.name);
    }

    pub fn down(&self, reason: impl Into<String>) {
        self.health.failing.lock().unwrap_or_else(PoisonError::into_inner).insert(self.name, reason.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_only_when_every_dependency_was_reached() {
        let health = Health::default();
        let broker = health.dependency("broker");
        let postgres = health.dependency("postgres");
        broker.up();
        assert_eq!(health.failing().into_keys().collect::<Vec<_>>(), ["postgres"]);
        postgres.up();
        assert!(health.failing().is_empty());
        broker.down("connection refused");
        assert_eq!(health.failing()["broker"], "connection refused");
    }
}
