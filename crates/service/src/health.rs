//! What a process depends on, and whether each of it works now.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The dependencies of one process. Cheap to clone; all clones share the state.
#[derive(Debug, Clone, Default)]
pub struct Health {
    failing: Arc<Mutex<BTreeMap<&'static str, String>>>,
    /// Whether anybody can ask already.
    served: Arc<AtomicBool>,
}

/// One dependency, for instance `postgres`. Starts as failing ("not yet reached").
#[derive(Debug, Clone)]
pub struct Dependency {
    name: &'static str,
    health: Health,
}

impl Health {
    /// Registers a dependency; until it is first reported up the process is not ready.
    ///
    /// # Panics
    /// When it is served already: whoever asked before was told "ready" by a process that had not said what it needs.
    #[must_use]
    pub fn dependency(&self, name: &'static str) -> Dependency {
        assert!(!self.served.load(Ordering::Acquire), "{name} is needed, and health is served already");
        let dependency = Dependency { name, health: self.clone() };
        dependency.down("not yet reached");
        dependency
    }

    /// From here on somebody may ask; all dependencies are known.
    pub(crate) fn serve(&self) {
        self.served.store(true, Ordering::Release);
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

    #[test]
    #[should_panic(expected = "postgres is needed, and health is served already")]
    fn a_dependency_that_comes_after_the_first_question_is_a_bug() {
        let health = Health::default();
        let _broker = health.dependency("broker");
        let _routes = crate::http::routes(crate::metrics::Registry::new(), health.clone());
        let _postgres = health.dependency("postgres");
    }
}
