//! The fleet of the contract: ten sites, four device types, 100,000 devices.
//!
//! The simulator publishes for these devices and the registry table lists them; both take them from here,
//! so a device number means the same machine everywhere.

/// A production site. Latitude and longitude in degrees, WGS 84. Source: contract, "Device telemetry".
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Site {
    pub site_id: &'static str,
    pub lat: f64,
    pub lon: f64,
}

/// One kind of machine: its name in topics and payloads, the prefix of its ids, its metrics in payload order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceType {
    pub name: &'static str,
    pub id_prefix: &'static str,
    pub metrics: &'static [&'static str],
}

pub const SITES: [Site; 10] = [
    Site { site_id: "WY-ALPHA", lat: 43.4231, lon: -106.3148 },
    Site { site_id: "TX-EAGLE", lat: 31.2319, lon: -101.8752 },
    Site { site_id: "ND-RAVEN", lat: 48.3992, lon: -102.7810 },
    Site { site_id: "CA-DELTA", lat: 35.3733, lon: -119.0187 },
    Site { site_id: "OK-BRAVO", lat: 35.5376, lon: -97.4206 },
    Site { site_id: "CO-SIERRA", lat: 39.5501, lon: -105.7821 },
    Site { site_id: "LA-GULF", lat: 29.9511, lon: -90.0715 },
    Site { site_id: "NM-MESA", lat: 34.5199, lon: -105.8701 },
    Site { site_id: "AK-NORTH", lat: 70.2008, lon: -148.4597 },
    Site { site_id: "MT-PEAK", lat: 47.5089, lon: -109.4532 },
];

pub const DEVICE_TYPES: [DeviceType; 4] = [
    DeviceType {
        name: "turbine",
        id_prefix: "TURB-",
        metrics: &[
            "rpm",
            "inlet_temp_c",
            "exhaust_temp_c",
            "vibration_mm_s",
            "pressure_bar",
            "power_kw",
            "fuel_flow_kg_h",
            "no_x_ppm",
        ],
    },
    DeviceType {
        name: "thermal_engine",
        id_prefix: "THRM-",
        metrics: &[
            "rpm",
            "coolant_temp_c",
            "oil_temp_c",
            "oil_pressure_bar",
            "load_pct",
            "fuel_rate_l_h",
            "soot_pct",
        ],
    },
    DeviceType {
        name: "electrical_rotor",
        id_prefix: "ELEC-",
        metrics: &[
            "rpm",
            "voltage_v",
            "current_a",
            "frequency_hz",
            "power_factor",
            "bearing_temp_c",
            "winding_temp_c",
        ],
    },
    DeviceType {
        name: "connected_device",
        id_prefix: "OGC-",
        metrics: &[
            "wellhead_pressure_bar",
            "wellhead_temp_c",
            "flow_rate_m3_h",
            "methane_leak_ppm",
            "battery_soc_pct",
            "rssi_dbm",
        ],
    },
];

/// One machine of the fleet, by its number from 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Device {
    pub number: u32,
    pub device_type: &'static DeviceType,
    pub site: &'static Site,
}

impl Device {
    /// The machine with this number. Types go round first, then sites, so that any number of devices from 0
    /// up is spread evenly: 100,000 give 25,000 of each type and 10,000 on each site.
    #[must_use]
    pub fn new(number: u32) -> Self {
        let [turbine, thermal, rotor, connected] = &DEVICE_TYPES;
        let device_type = match number % 4 {
            0 => turbine,
            1 => thermal,
            2 => rotor,
            _ => connected,
        };
        let site = SITES.iter().cycle().nth((number / 4 % 10) as usize).unwrap_or(&SITES[0]);
        Self { number, device_type, site }
    }

    /// Its public id, for instance `TURB-00417`: the type's prefix and its number within the type.
    #[must_use]
    pub fn device_id(&self) -> String {
        format!("{}{:05}", self.device_type.id_prefix, self.number / 4)
    }

    /// The firmware it left the factory with; four releases are in the field.
    #[must_use]
    pub fn firmware(&self) -> &'static str {
        match self.number / 40 % 4 {
            0 => "3.4.1",
            1 => "3.4.2",
            2 => "3.5.0",
            _ => "2.9.8",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{HashMap, HashSet};

    #[test]
    fn the_fleet_of_the_contract_is_spread_evenly_and_has_unique_ids() {
        let mut ids = HashSet::new();
        let mut per_site = HashMap::new();
        let mut per_type = HashMap::new();
        for number in 0..100_000 {
            let device = Device::new(number);
            assert!(ids.insert(device.device_id()));
            *per_site.entry(device.site.site_id).or_insert(0) += 1;
            *per_type.entry(device.device_type.name).or_insert(0) += 1;
        }
        assert_eq!(per_site.len(), 10);
        assert!(per_site.values().all(|n| *n == 10_000));
        assert_eq!(per_type.len(), 4);
        assert!(per_type.values().all(|n| *n == 25_000));
        assert!(ids.contains("TURB-00417"));
    }
}
