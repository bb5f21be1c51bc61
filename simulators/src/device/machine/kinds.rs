//! The four kinds of machine: formulas from a [`Moment`] to metrics, and the faults each kind knows.

use wire::fleet::Device;

use super::{Fault, Metric, Moment, Status};

const fn metric(decimals: u8, low: f32, high: f32) -> Metric {
    Metric { decimals, low, high }
}

/// A place a kind does not use.
const NONE: Metric = metric(0, 0.0, 0.0);

/// Per kind, in the order of `wire::fleet::DEVICE_TYPES` and of the metrics there.
pub const METRICS: [[Metric; 8]; 4] = [
    [
        metric(0, 2800.0, 3800.0),
        metric(1, 320.0, 460.0),
        metric(1, 430.0, 720.0),
        metric(2, 0.5, 12.0),
        metric(2, 7.0, 19.0),
        metric(1, 500.0, 6200.0),
        metric(1, 200.0, 1700.0),
        metric(1, 5.0, 60.0),
    ],
    [
        metric(0, 550.0, 2000.0),
        metric(1, 65.0, 125.0),
        metric(1, 70.0, 140.0),
        metric(2, 0.4, 6.5),
        metric(1, 5.0, 101.0),
        metric(1, 20.0, 480.0),
        metric(1, 0.0, 100.0),
        NONE,
    ],
    [
        metric(0, 1400.0, 1520.0),
        metric(1, 5200.0, 7000.0),
        metric(1, 20.0, 520.0),
        metric(2, 59.5, 60.5),
        metric(3, 0.60, 1.0),
        metric(1, 25.0, 130.0),
        metric(1, 30.0, 190.0),
        NONE,
    ],
    [
        metric(2, 30.0, 200.0),
        metric(1, 30.0, 110.0),
        metric(2, 2.0, 120.0),
        metric(1, 0.5, 60.0),
        metric(1, 2.0, 101.0),
        metric(0, -115.0, -45.0),
        NONE,
        NONE,
    ],
];

const fn ok(code: &'static str) -> Status {
    Status { state: "OK", code, message: "Nominal" }
}

const fn fault(warning: (&'static str, &'static str), critical: (&'static str, &'static str)) -> Fault {
    Fault {
        warning: Status { state: "WARN", code: warning.0, message: warning.1 },
        critical: Status { state: "CRITICAL", code: critical.0, message: critical.1 },
    }
}

const TURBINE: [Fault; 3] = [
    fault(("TURB-W-VIB", "Vibration rising, check bearing"), ("TURB-C-VIB", "Vibration above trip limit")),
    fault(
        ("TURB-W-FOUL", "Compressor fouling, exhaust hot"),
        ("TURB-C-EGT", "Exhaust temperature above limit"),
    ),
    fault(("TURB-W-NOX", "NOx rising, check burner nozzle"), ("TURB-C-NOX", "NOx above permitted limit")),
];

const ENGINE: [Fault; 3] = [
    fault(("THRM-W-COOL", "Coolant temperature rising"), ("THRM-C-COOL", "Coolant overheated")),
    fault(("THRM-W-OILP", "Oil pressure falling"), ("THRM-C-OILP", "Oil pressure below minimum")),
    fault(("THRM-W-SOOT", "Soot filter filling"), ("THRM-C-SOOT", "Soot filter blocked")),
];

const ROTOR: [Fault; 3] = [
    fault(("ELEC-W-BRG", "Bearing temperature rising"), ("ELEC-C-BRG", "Bearing overheated")),
    fault(("ELEC-W-WDG", "Winding temperature rising"), ("ELEC-C-WDG", "Winding above insulation class")),
    fault(("ELEC-W-PF", "Power factor falling, excitation"), ("ELEC-C-PF", "Excitation lost")),
];

const WELL: [Fault; 3] = [
    fault(("OGC-W-CH4", "Methane above background"), ("OGC-C-CH4", "Methane leak")),
    fault(("OGC-W-PRES", "Wellhead pressure falling"), ("OGC-C-PRES", "Wellhead pressure lost")),
    fault(("OGC-W-BATT", "Battery does not charge"), ("OGC-C-BATT", "Battery nearly empty")),
];

/// The status of a machine of this kind without a visible fault.
pub(super) fn nominal(device: &Device) -> Status {
    match device.number % 4 {
        0 => ok("TURB-OK"),
        1 => ok("THRM-OK"),
        2 => ok("ELEC-OK"),
        _ => ok("OGC-OK"),
    }
}

/// The metrics of this moment, scaled, and the faults of the machine's kind.
pub(super) fn measure(device: &Device, moment: &Moment) -> ([i32; 8], &'static [Fault; 3]) {
    let [turbine_metrics, engine_metrics, rotor_metrics, well_metrics] = &METRICS;
    let (metrics, values, faults) = match device.number % 4 {
        0 => (turbine_metrics, turbine(moment), &TURBINE),
        1 => (engine_metrics, engine(moment), &ENGINE),
        2 => (rotor_metrics, rotor(moment), &ROTOR),
        _ => (well_metrics, well(moment), &WELL),
    };
    let mut scaled = [0; 8];
    for ((scaled, value), metric) in scaled.iter_mut().zip(values).zip(metrics) {
        *scaled = scale(value, metric.decimals);
    }
    (scaled, faults)
}

#[allow(clippy::cast_possible_truncation, reason = "the limits above are far within an i32")]
fn scale(value: f32, decimals: u8) -> i32 {
    let factor = match decimals {
        0 => 1.0,
        1 => 10.0,
        2 => 100.0,
        _ => 1000.0,
    };
    let scaled = value * factor;
    (scaled + if scaled < 0.0 { -0.5 } else { 0.5 }) as i32
}

fn turbine(m: &Moment) -> [f32; 8] {
    let [rpm, inlet, exhaust, vibration, pressure, power, fuel, no_x] = m.noise;
    let [bearing, fouling, nozzle] = m.faults;
    let power_kw = (600.0 + 5200.0 * m.load) * (1.0 - 0.03 * m.wear - 0.12 * fouling) + 8.0 * power;
    [
        2900.0 + 750.0 * m.load + 4.0 * rpm,
        335.0 + 105.0 * m.warm + 0.8 * inlet,
        450.0 + 135.0 * m.warm + 15.0 * m.wear + 95.0 * fouling + 1.2 * exhaust,
        1.0 + 0.8 * m.load + 0.7 * m.wear + 7.5 * bearing + 0.12 * vibration,
        9.5 + 8.0 * m.load - 1.8 * fouling + 0.05 * pressure,
        power_kw,
        140.0 + 0.22 * power_kw * (1.0 + 0.05 * m.wear + 0.10 * fouling + 0.04 * nozzle) + 2.0 * fuel,
        8.0 + 13.0 * m.warm + 3.0 * m.wear + 28.0 * nozzle + 0.4 * no_x,
    ]
}

fn engine(m: &Moment) -> [f32; 8] {
    let [rpm, coolant, oil, pressure, load, fuel, soot, _] = m.noise;
    let [cooling, oil_loss, clogging] = m.faults;
    // A loaded filter is burnt free every few hours: a saw tooth within the service interval.
    let filling = (m.wear * 16.0).fract();
    [
        620.0 + 1250.0 * m.load + 6.0 * rpm,
        74.0 + 16.0 * m.warm + 27.0 * cooling + 0.4 * coolant,
        79.0 + 22.0 * m.warm + 18.0 * cooling + 6.0 * oil_loss + 0.4 * oil,
        (2.4 + 3.0 * m.load - 0.4 * m.wear) * (1.0 - 0.72 * oil_loss) + 0.04 * pressure,
        100.0 * m.load * 0.985 + 0.6 * load + 0.6,
        28.0 + 390.0 * m.load * (1.0 + 0.04 * m.wear + 0.08 * clogging) + 1.5 * fuel,
        6.0 + 32.0 * filling + 54.0 * clogging + 0.5 * soot,
        0.0,
    ]
}

fn rotor(m: &Moment) -> [f32; 8] {
    let [rpm, voltage, current, frequency, factor, bearing, winding, _] = m.noise;
    let [bearing_fault, winding_fault, excitation] = m.faults;
    // An induction machine slips with its load; the grid's frequency is the site's, near 60 Hz.
    let power_factor = 0.955 - 0.07 * (1.0 - m.load) - 0.22 * excitation + 0.004 * factor;
    [
        1500.0 - 34.0 * m.load + 1.5 * rpm,
        6600.0 - 140.0 * m.load + 60.0 * m.slow - 380.0 * excitation + 6.0 * voltage,
        28.0 + 330.0 * m.load * (1.0 + 0.25 * excitation) + 1.5 * current,
        60.0 + 0.05 * m.slow + 0.02 * frequency,
        power_factor,
        38.0 + 24.0 * m.warm + 7.0 * m.wear + 52.0 * bearing_fault + 0.4 * bearing,
        48.0 + 58.0 * m.warm + 5.0 * m.wear + 64.0 * winding_fault + 9.0 * excitation + 0.5 * winding,
        0.0,
    ]
}

fn well(m: &Moment) -> [f32; 8] {
    let [pressure, temperature, flow, methane, battery, rssi, _, _] = m.noise;
    let [leak, pressure_loss, battery_fault] = m.faults;
    // A wide-open choke flows more and leaves less pressure at the head.
    let open = m.load;
    [
        (165.0 - 55.0 * open - 12.0 * m.wear) * (1.0 - 0.55 * pressure_loss) - 6.0 * leak + 0.3 * pressure,
        48.0 + 36.0 * m.warm + 4.0 * m.slow + 0.3 * temperature,
        (10.0 + 82.0 * open) * (1.0 - 0.7 * pressure_loss) + 0.4 * flow,
        2.4 + 0.9 * m.slow + 1.2 * m.wear + 42.0 * leak + 0.2 * methane,
        76.0 + 18.0 * m.slow - 52.0 * battery_fault + 0.3 * battery,
        -80.0 + 9.0 * m.slow + 4.0 * rssi,
        0.0,
        0.0,
    ]
}
